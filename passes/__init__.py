"""The passes of qgraph, one file each. Users import them from `qgraph.passes`."""
