"""The virtual database `cenote`: for the users in `admin_users` the daemon shows itself, and takes orders."""
