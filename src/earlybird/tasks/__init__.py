"""What else is learnt from images than their class: heads on the features of a classifier, their loss and measure."""
