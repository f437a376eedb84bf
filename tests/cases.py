"""Small settings of every system and kind of token loss, for what must hold for all of them."""

# name -> (kind of tokens, settings), as tests.conftest.small_config takes them
EVERY_SYSTEM = {
    "global": ("discrete", {"density": 2}),
    "local": ("discrete", {"head": "local", "window": 4, "density": 2}),
    "ddpm": ("continuous", {}),
    "1d-raster": ("discrete", {"system": "1d-raster"}),
    "1d-random": ("continuous", {"system": "1d-random", "token_loss": "flow"}),
    "llamagen": ("discrete", {"system": "llamagen"}),
    "npp": ("discrete", {"system": "npp"}),
    "two streams": ("continuous", {"system": "sar"}),
    "one stream": ("continuous", {"system": "sar", "grouping": "next-row"}),
}
