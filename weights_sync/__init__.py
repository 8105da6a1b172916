"""weights_sync"""
