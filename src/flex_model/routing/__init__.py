"""Moving values between ranks: routes with gradients, delivery, selections."""
