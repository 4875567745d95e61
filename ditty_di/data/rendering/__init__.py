"""From records to token ids and loss masks: templates, conversations, images."""
