"""How a compressed checkpoint is laid out, loaded and checked: exact, native, dense."""
