"""What the field measures of an edited model, by teacher forcing and by free generation: questions, outcomes, scores, the table."""
