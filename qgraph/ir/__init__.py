"""The graph: records, operators, editing, verification, text. See `qgraph.ir.node_info` for the central type."""
