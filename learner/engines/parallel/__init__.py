"""How a model is divided over the mesh: one plan function a dimension."""
