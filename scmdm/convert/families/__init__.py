"""Published layouts, one module per family.

To add one, write a `PublishedLayout` and name it in `scmdm.config.layouts`.
"""
