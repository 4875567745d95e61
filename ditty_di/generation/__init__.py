"""From prompts to text: reading them, continuing them, opening what was exported."""
