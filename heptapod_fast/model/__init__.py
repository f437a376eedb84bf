"""Model parts: blocks and backbone, 2D heads, token losses. No data, no training, no I/O."""
