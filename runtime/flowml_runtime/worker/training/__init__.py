"""Training on one worker: interprets the actions of the training machines."""
