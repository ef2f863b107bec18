"""The losses of encoder, quantizer and decoder, and of the discriminator."""
