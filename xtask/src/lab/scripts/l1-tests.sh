# The command of a run of tests in L1: PROGRAM... -- ARGUMENT..., each program run with the arguments whatever becomes of
# the others, and in the end the figures that the tests noted.
programs=
while [ "$1" != -- ]; do
	programs="$programs $1"
	shift
done
shift
# A VM that is there all the time: with the first and the last one KVM patches the scheduler's code, and an emulated CPU
# that is in it just then may die of the breakpoint that is there for a moment.
./cpr-vmm -S -nodefaults -display none &
spare=$!
status=0
for program in $programs; do
	echo "== $program"
	./"$program" "$@" || status=$?
done
kill $spare
if [ -s "$CPR_LAB_OUT/figures" ]; then
	echo "== figures"
	cat "$CPR_LAB_OUT/figures"
fi
exit $status
