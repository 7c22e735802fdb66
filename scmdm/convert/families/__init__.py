"""Published layouts, one module per family. To add one, write a `Layout` and name it in `scmdm.config.layouts`."""
