"""What pretraining, SFT and reward training share: TRL's trainers under our dials, loss and log."""
