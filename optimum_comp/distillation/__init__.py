"""Distillation: a small model is trained on the predictions of the model that it was made from."""
