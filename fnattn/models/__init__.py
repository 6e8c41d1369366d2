"""Whole models over any family of attention: language models, and how to generate from them."""
