"""How ranks divide a model: one interface, sharded and DeepSpeed engines, mesh, optimiser."""
