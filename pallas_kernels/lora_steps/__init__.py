"""The adapters' work of each tile, cut into steps of four pages."""
