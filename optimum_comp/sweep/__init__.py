"""One loop over the decoder layers, and what visits them."""
