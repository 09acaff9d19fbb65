"""The ablation of the attention: which part of it is worth what."""
