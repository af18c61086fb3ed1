"""Drawing and completing images, pixel by pixel."""
