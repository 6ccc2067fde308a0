"""The mathematics, in torch or by the kernels, which only this room imports."""
