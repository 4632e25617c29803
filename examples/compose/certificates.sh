#!/bin/sh
# Makes what a federation with TLS needs, once: a CA, the server's certificate, one that may look (for the
# health check), an operator's, and a token for each site that has data. What is there already stays.
#
# A real federation does the same by hand, the CA on a machine of its operator's, and brings each token
# to its site by a way that both trust.
set -eu

data=${DATA:-/data}
folder=${FEDERATION:-/federation}
ca=$folder/ca

# Each asks for the file that its command writes last, so what was cut off is made anew.
[ -e "$ca/ca.pem" ] || seqfed ca init --ca "$ca" --force
[ -e "$folder/server/cert.pem" ] ||
  seqfed ca issue server server localhost 127.0.0.1 --ca "$ca" --out "$folder/server" --force
[ -e "$folder/viewer/cert.pem" ] || seqfed ca issue viewer health --ca "$ca" --out "$folder/viewer" --force
[ -e "$folder/operator/cert.pem" ] || seqfed ca issue operator compose --ca "$ca" --out "$folder/operator" --force
for shard in "$data"/site-*/; do
  site=$(basename "$shard")
  [ -e "$folder/tokens/$site.token" ] ||
    seqfed enroll token --client "$site" --ca "$ca" --valid 7d --out "$folder/tokens/$site.token"
done
