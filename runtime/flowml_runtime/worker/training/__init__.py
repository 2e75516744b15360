"""Training on one worker: carries out the actions of the training state machines."""
