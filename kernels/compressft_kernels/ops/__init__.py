"""The public functions as custom operators: a Triton kernel where the device has one, else the plain-torch twin."""
