-- What an agent asks a human for, in place of a call. The step's capability is the word 'provide_input', which no capability can
-- have as its id. Nothing is reserved, granted or charged, and what ends the ticket ends the step in the same transaction:
-- an input makes it succeed with the input as its output, a denial and the deadline refuse it.

-- Books one ask: parks the run on a ticket, or refuses the attempt. One call, one transaction. Where a halt stands, the run is
-- being cancelled or another policy was activated, nothing is written: the agent says the same again when its turn comes.
-- The same ask again answers the same, also when it was answered meanwhile. The command `c` is built by storage/commands.
-- Locks, as an admission's: policy and halt scopes (shared), run, ticket, stream head.
CREATE FUNCTION engine_ask_v1(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_run     run_states;
    v_step    run_steps;
    v_policy  text;
    v_halt    jsonb;
    v_verdict jsonb := c -> 'decision';
    v_state   text := 'denied';
    v_asked   bigint;
    v_answer  jsonb;
    v_event   jsonb;
BEGIN
    SELECT * INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id;  -- what it belongs to never changes
    PERFORM engine_lock_above_v3(v_tenant, v_run_id, v_run.run_group_id, v_run.agent_id, NULL);
    PERFORM 1 FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id FOR UPDATE;
    SELECT * INTO v_step FROM run_steps WHERE tenant_id = v_tenant AND run_id = v_run_id
        AND step_index = (c ->> 'step_index')::integer AND attempt = (c ->> 'attempt')::integer;
    IF FOUND THEN
        RETURN engine_asked_v1(c, v_step);
    END IF;
    v_run := engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, true);
    SELECT digest INTO v_policy FROM policy_activations WHERE role = 'active' ORDER BY number DESC LIMIT 1;
    IF v_policy <> c ->> 'policy_digest' THEN
        RETURN jsonb_build_object('status', 'policy_changed', 'message', format(
            'policy %s decided, and meanwhile policy %s was activated', left(c ->> 'policy_digest', 12), left(v_policy, 12)));
    END IF;
    v_halt := engine_standing_halt_v2(v_tenant, v_run_id, v_run.run_group_id, v_run.agent_id, NULL);
    IF v_halt IS NOT NULL THEN
        RETURN engine_halted_v2(v_halt) - '{outcome,halt}'::text[] || '{"status": "denied"}';
    ELSIF v_run.cancel_requested_at IS NOT NULL THEN
        RETURN '{"status": "denied", "reason": "cancel_requested", "rule": "cancel",
            "message": "the run is being cancelled", "unblock": "nothing: somebody cancelled the run"}';
    END IF;

    IF v_verdict ->> 'outcome' = 'ask' THEN
        SELECT count(*) INTO v_asked FROM approval_tickets
            WHERE tenant_id = v_tenant AND run_id = v_run_id AND capability = c ->> 'capability';
        IF v_asked < (c ->> 'most')::integer THEN
            v_state := 'awaiting_approval';
        ELSE
            v_verdict := c -> 'beyond';
        END IF;
    END IF;
    v_answer := jsonb_strip_nulls(jsonb_build_object('reason', v_verdict -> 'reason', 'message', v_verdict -> 'message',
        'rule', v_verdict -> 'rule', 'unblock', v_verdict -> 'unblock',
        'status', CASE v_state WHEN 'denied' THEN 'denied' ELSE 'pending' END,
        'ticket_id', CASE v_state WHEN 'denied' THEN NULL ELSE c #> '{ticket,id}' END));
    v_answer := v_answer || engine_write_attempt_v4(c || jsonb_build_object('decision', v_verdict), v_state, v_answer,
        '{"opens": true}');
    UPDATE run_states SET reason = v_verdict ->> 'reason'
        WHERE tenant_id = v_tenant AND run_id = v_run_id AND state = 'awaiting_approval';
    v_event := jsonb_build_object('step', c -> 'step_index', 'step_id', c -> 'step_id', 'attempt', c -> 'attempt',
        'capability', c -> 'capability', 'resource', c -> 'resource', 'digest', c -> 'digest',
        'policy_digest', c -> 'policy_digest', 'decision', v_verdict, 'answer', v_answer, 'ticket_kind', 'input',
        'question', c #> '{arguments,question}', 'schema', c #> '{arguments,schema}');
    PERFORM engine_append_event_v3(v_tenant, 'run/' || v_run_id,
        CASE v_state WHEN 'denied' THEN 'step_denied' ELSE 'approval_requested' END, c ->> 'actor', v_event);
    RETURN v_answer || '{"replayed": false}';
END
$$;

-- What an ask was answered with when it was booked.
CREATE FUNCTION engine_asked_v1(c jsonb, p_step run_steps) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_deadline timestamptz;
BEGIN
    IF p_step.capability <> c ->> 'capability' OR p_step.arguments_digest <> c ->> 'digest'
       OR p_step.step_id <> c ->> 'step_id' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'attempt %s of step %s of run %s was already used for something else', p_step.attempt, p_step.step_index, p_step.run_id);
    ELSIF p_step.ticket_id IS NULL THEN
        RETURN p_step.error || '{"replayed": true}';
    END IF;
    SELECT deadline INTO v_deadline FROM approval_tickets WHERE tenant_id = p_step.tenant_id AND id = p_step.ticket_id;
    RETURN jsonb_build_object('reason', p_step.decision -> 'reason', 'message', p_step.decision -> 'message',
        'rule', p_step.decision -> 'rule', 'unblock', p_step.decision -> 'unblock', 'status', 'pending',
        'ticket_id', p_step.ticket_id, 'deadline', v_deadline, 'replayed', true);
END
$$;

-- Ends the step of an ask with its ticket, which is decided or over; the caller holds run and ticket.
CREATE FUNCTION engine_end_ask_v1(p_ticket approval_tickets, p_output jsonb, p_reason text, p_message text) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    UPDATE run_steps SET state = CASE WHEN p_reason IS NULL THEN 'succeeded' ELSE 'denied' END, output = p_output,
            evidence = CASE WHEN p_reason IS NULL THEN 'reported' END, finished_at = clock_timestamp(),
            error = CASE WHEN p_reason IS NOT NULL THEN jsonb_build_object('reason', p_reason, 'message', p_message,
                'rule', decision -> 'rule', 'status', 'denied', 'ticket_id', p_ticket.id) END
        WHERE tenant_id = p_ticket.tenant_id AND run_id = p_ticket.run_id AND step_index = p_ticket.step_index
          AND attempt = p_ticket.attempt AND state = 'awaiting_approval';
END
$$;

-- Takes the input that a human gives: the first valid word ends the ticket and its step, and the run goes on.
-- Answers {"status": "decided" | "refused", ...}; the same input by the same person again answers the same.
CREATE FUNCTION engine_provide_input_v1(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_id      uuid := (c ->> 'ticket_id')::uuid;
    v_voter   uuid := (c ->> 'voter')::uuid;
    v_run     run_states;
    v_was     text;
    v_ticket  approval_tickets;
    v_refusal jsonb;
BEGIN
    SELECT run_id INTO v_ticket.run_id FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'approval ticket', DETAIL = v_id;
    END IF;
    SELECT * INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id FOR UPDATE;
    SELECT * INTO v_ticket FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id FOR UPDATE;
    IF v_ticket.decided_by = v_voter AND v_ticket.state = 'approved' AND EXISTS (
        SELECT FROM run_steps WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id AND step_index = v_ticket.step_index
            AND attempt = v_ticket.attempt AND output::text = (c -> 'input')::text)
    THEN
        RETURN jsonb_build_object('status', 'decided', 'run_id', v_ticket.run_id, 'replayed', true, 'deliver', false);
    END IF;
    v_was := v_ticket.state;
    v_ticket := engine_time_out_ticket_v2(v_ticket, c ->> 'actor');
    v_refusal := engine_refused_vote_v3(v_ticket, v_run.principal, c);
    IF v_refusal IS NOT NULL THEN
        RETURN v_refusal || jsonb_build_object('status', 'refused', 'run_id', v_ticket.run_id,
            'deliver', v_was = 'pending' AND v_ticket.state = 'expired');
    END IF;
    UPDATE approval_tickets SET state = 'approved', decided_at = clock_timestamp(), decided_by = v_voter,
            comment = c ->> 'comment'
        WHERE tenant_id = v_tenant AND id = v_id AND state = 'pending';
    PERFORM engine_end_ask_v1(v_ticket, c -> 'input', NULL, NULL);
    UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
        WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id AND state = 'awaiting_approval';
    PERFORM engine_append_event_v3(v_tenant, 'run/' || v_ticket.run_id, 'approval_decided', c ->> 'actor',
        jsonb_strip_nulls(jsonb_build_object('ticket_id', v_id, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt,
            'vote', c ->> 'vote', 'authority', c -> 'authority', 'decision', 'approved', 'digest', v_ticket.digest,
            'comment', NULLIF(c ->> 'comment', ''), 'ticket_kind', 'input'))
        || jsonb_build_object('input', c -> 'input'));
    RETURN jsonb_build_object('status', 'decided', 'run_id', v_ticket.run_id, 'replayed', false, 'deliver', true);
END
$$;
