"""VLM Spectra's server side: what a GPU box runs. Needs the extra `vlm-spectra[server]`."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read once, by the import of grpc: a broken connection is no remark
