"""What may be sent when: order within a device, a rate, and rest while the platform is down."""
