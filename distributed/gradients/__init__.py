"""The way of gradients: noted in backward, reduced, kept by their owners, clipped by their norm.

And the tools of PyTorch that look for them in `p.grad`, where they no longer are.
"""
