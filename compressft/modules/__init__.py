"""nn.Modules over the kernels: one room per weight, one room per attention."""
