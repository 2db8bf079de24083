"""The contract, version 1: generated from `protos/`; `make protos` writes it again."""
