"""The ablation of the attention: which part of it is worth what.

``tools/ablate.py`` runs it. It needs torch, Pillow and, for the picture, matplotlib.
"""
