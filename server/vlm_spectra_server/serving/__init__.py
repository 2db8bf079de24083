"""The server: a front that speaks gRPC and one worker process a model, which alone has the device."""
