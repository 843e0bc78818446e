"""How models are made: text to tokens, tokens to a trained model, a killed run to a resumed one."""
