"""Many engines and a few routers in virtual time: what is lost by what routers do not know."""
