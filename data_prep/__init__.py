"""One module per corpus: raw files -> clean records. The machinery is `scmdm.data`."""
