"""
What a first reader skips: settings, the device, several processes, signals, checkpoints, file
formats, tokens, downloads and errors. One job per file, named for it; nothing here knows the model
or the training loop.
"""
