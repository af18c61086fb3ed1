"""Pictures: grids by Pillow, curves and patterns by matplotlib, one HTML page."""
