"""Keys and values in blocks, one attention for ragged passes, CUDA graphs: how a GPU decodes.

Made after a prototype that was measured on an H200. The kernels are tested in Triton's interpreter, everything else on
the CPU, where Triton's kernels have twins in torch.
"""
