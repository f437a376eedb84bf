"""A package of this name, so that no other one is found for it: torch-fidelity installs one too."""
