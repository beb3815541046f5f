"""A small vision-language model learns to answer questions about scanned handwritten digits.

The data are scikit-learn's 1,797 digits (bundled, no download). The model, the packed rows and the training loop keep
nanoVLM's contract, so what the hooks see here is what they see there.
"""
