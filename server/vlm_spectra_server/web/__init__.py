"""The web app: look inside a model in a browser. A client of `vlm_spectra.VLM`; PyTorch is never imported here."""
