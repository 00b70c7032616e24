"""The trainer against TRL's `SFTTrainer` and the paper's procedure: time to every fact proved, harm, forgetting, density."""
