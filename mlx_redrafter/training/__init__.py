"""Training a drafter on text that the target model wrote itself."""
