"""Answers computed where the weights are: the logit lens, attribution."""
