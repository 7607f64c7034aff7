"""Puzzle Mix inside timm training."""
