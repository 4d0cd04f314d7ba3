"""Finetuning: adapters, states or all weights, by a trainer that knows what a recurrent model can do.

run.finetune     everything that the command does, from folders to a folder
trainer.train    the same from a model and samples in memory
adapters.apply   put a trained adapter on a model
"""
