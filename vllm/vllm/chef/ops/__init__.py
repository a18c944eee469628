"""What a cycle does with its columns: `eager` in torch, and the same functions `fused` in Triton."""
