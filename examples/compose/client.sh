#!/bin/sh
# Starts a client on the first shard that no other replica holds. A replica does not know its own
# number, so it takes a lock on a shard instead. The kernel holds the lock for as long as the process
# lives and drops it with the process, however that ends: a restarted or re-created replica finds a
# free shard, and with it the state that the shard's site had before. (A claim made with mkdir would
# outlive a killed replica.) The first client on a shard enrols its site with the site's token.
set -eu

data=${DATA:-/data}
state=${STATE:-/state}
folder=${FEDERATION:-/federation}

for shard in "$data"/site-*/; do
  [ -d "$shard" ] || { echo "client.sh: no site-* folder in $data; run prepare.py first" >&2; exit 1; }
  site=$(basename "$shard")
  mkdir -p "$state/$site"
  exec 9>"$state/$site/claim" # stays open across the exec below, and with it the lock
  if flock --nonblock 9; then
    echo "client.sh: holding $site"
    [ -e "$state/$site/credentials/cert.pem" ] ||
      seqfed client enroll --token-file "$folder/tokens/$site.token" --state "$state/$site"
    exec seqfed client --name "$site" --state "$state/$site" \
      --data "$data/$site/train.npz" --validation "$data/$site/validation.npz"
  fi
done

echo "client.sh: every shard in $data is held by another client;" \
  "start fewer clients, or deal more shards (SHARDS=N after docker-compose down --volumes)" >&2
exit 1
