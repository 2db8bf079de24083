"""VLM Spectra's server side: what a GPU box runs. Needs the extra `vlm-spectra[server]`."""
