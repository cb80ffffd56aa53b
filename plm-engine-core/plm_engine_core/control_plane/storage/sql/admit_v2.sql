-- Books one decision: refuses, parks on a ticket, or reserves and grants. One call, one transaction.
-- Locks, always in this order: idempotency record, halt scopes, run, ticket, budgets from narrow to wide, grant, stream head.
-- Each book has its own function in its own file; this one only says in which order they are asked.
-- The command `c` is built by storage/postgres; every key it reads is written there.
CREATE FUNCTION engine_admit_v2(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_run     run_states;
    v_halt    jsonb;
    v_verdict jsonb;
    v_state   text;
    v_answer  jsonb;
BEGIN
    PERFORM engine_enter_v1(v_tenant);
    v_answer := engine_recall_v2(v_tenant, 'admit', c ->> 'command_id', c ->> 'command_digest');
    IF v_answer IS NOT NULL THEN
        RETURN v_answer || '{"replayed": true}';
    END IF;

    -- What a run belongs to never changes, so it may be read before the run is locked.
    SELECT * INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id;
    PERFORM engine_lock_halts_v2(v_tenant, v_run_id, v_run.run_group_id, v_run.agent_id, c ->> 'capability');
    v_halt := engine_standing_halt_v2(v_tenant, v_run_id, v_run.run_group_id, v_run.agent_id, c ->> 'capability');
    PERFORM engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, true);

    v_verdict := jsonb_build_object('outcome', c #> '{decision,outcome}', 'reason', c #> '{decision,reason}',
        'message', c #> '{decision,message}', 'rule', c #> '{decision,rule}', 'unblock', c #> '{decision,unblock}',
        'guidance', c #> '{decision,guidance}', 'retry_after_ms', c #> '{decision,retry_after_ms}');
    IF v_halt IS NOT NULL THEN
        v_verdict := v_verdict || engine_halted_v2(v_halt);
    ELSIF v_verdict ->> 'outcome' = 'ask' THEN
        v_verdict := v_verdict || engine_ticket_v2(c);
    END IF;
    IF v_verdict ->> 'outcome' = 'allow' THEN
        v_verdict := v_verdict || engine_reserve_v2(v_tenant, c -> 'reserve');
    END IF;

    v_state := CASE v_verdict ->> 'outcome' WHEN 'allow' THEN 'granted' WHEN 'ask' THEN 'awaiting_approval'
                                            WHEN 'steer' THEN 'steered' ELSE 'denied' END;
    IF v_state = 'awaiting_approval' AND v_verdict ->> 'ticket_id' IS NULL THEN
        v_verdict := v_verdict || jsonb_build_object('ticket_id', c #> '{ticket,id}', 'opens', true);
    END IF;
    v_answer := jsonb_strip_nulls(v_verdict - '{outcome,reserved,opens}'::text[]) || jsonb_build_object(
        'status', CASE v_state WHEN 'awaiting_approval' THEN 'pending' ELSE v_state END, 'replayed', false);
    PERFORM engine_write_step_v2(c, v_state, v_answer);

    IF v_state = 'granted' THEN
        v_answer := v_answer || engine_issue_grant_v2(c, v_verdict -> 'reserved');
        PERFORM engine_use_approval_v2(v_tenant, v_verdict);
    ELSIF v_state = 'awaiting_approval' THEN
        IF v_verdict -> 'opens' = 'true' THEN
            v_answer := v_answer || engine_open_ticket_v2(c);
        END IF;
        UPDATE run_states SET state = 'awaiting_approval', reason = 'approval_required',
                message = v_answer ->> 'message', lease_owner = NULL, lease_expires_at = NULL,
                updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_run_id;
    END IF;

    PERFORM engine_append_event_v1(v_tenant, 'run/' || v_run_id,
        CASE v_state WHEN 'awaiting_approval' THEN 'approval_requested' ELSE 'step_' || v_state END, c ->> 'actor',
        jsonb_strip_nulls(jsonb_build_object('step', c -> 'step_index', 'step_id', c -> 'step_id',
            'attempt', c -> 'attempt', 'capability', c -> 'capability', 'resource', c -> 'resource',
            'digest', c -> 'digest', 'policy_digest', c -> 'policy_digest', 'decision', c -> 'decision',
            'answer', v_answer - 'replayed', 'reserved', v_verdict -> 'reserved')));
    UPDATE idempotency_records SET result = v_answer
        WHERE tenant_id = v_tenant AND operation = 'admit' AND command_id = c ->> 'command_id';
    RETURN v_answer;
END
$$;

-- Takes a command id, or answers what it answered before: whoever comes second waits for whoever came first.
CREATE FUNCTION engine_recall_v2(p_tenant uuid, p_operation text, p_command text, p_digest text) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_record idempotency_records;
BEGIN
    INSERT INTO idempotency_records (tenant_id, operation, command_id, digest)
        VALUES (p_tenant, p_operation, p_command, p_digest) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        RETURN NULL;
    END IF;
    SELECT * INTO v_record FROM idempotency_records
        WHERE tenant_id = p_tenant AND operation = p_operation AND command_id = p_command;
    IF v_record.digest <> p_digest THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'command %s was already used for another proposal', p_command);
    END IF;
    RETURN v_record.result;
END
$$;

-- Writes the attempt as it now stands; an attempt that waited for approval is decided once more, any other never again.
CREATE FUNCTION engine_write_step_v2(c jsonb, p_state text, p_answer jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    INSERT INTO run_steps AS s (tenant_id, run_id, step_index, attempt, step_id, step_key, capability, resource,
            arguments, arguments_digest, executor_kind, state, decision, grant_id, ticket_id, error)
        VALUES ((c ->> 'tenant_id')::uuid, (c ->> 'run_id')::uuid, (c ->> 'step_index')::integer,
            (c ->> 'attempt')::integer, c ->> 'step_id', c ->> 'step_key', c ->> 'capability', c ->> 'resource',
            c -> 'arguments', c ->> 'digest', c ->> 'executor_kind', p_state, c -> 'decision',
            CASE WHEN p_state = 'granted' THEN (c #>> '{grant,id}')::uuid END, (p_answer ->> 'ticket_id')::uuid,
            CASE WHEN p_state IN ('denied', 'steered') THEN p_answer END)
        ON CONFLICT (tenant_id, run_id, step_index, attempt) DO UPDATE
            SET state = EXCLUDED.state, decision = EXCLUDED.decision, grant_id = EXCLUDED.grant_id, error = EXCLUDED.error,
                ticket_id = COALESCE(s.ticket_id, EXCLUDED.ticket_id), capability = EXCLUDED.capability,
                resource = EXCLUDED.resource, arguments = EXCLUDED.arguments, arguments_digest = EXCLUDED.arguments_digest
            WHERE s.state = 'awaiting_approval' AND s.step_id = EXCLUDED.step_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format('attempt %s of step %s of run %s was already decided',
            c ->> 'attempt', c ->> 'step_index', c ->> 'run_id');
    END IF;
END
$$;

-- Issues the grant with its reservations.
CREATE FUNCTION engine_issue_grant_v2(c jsonb, p_reserved jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_expires timestamptz := clock_timestamp() + make_interval(secs => (c #>> '{grant,seconds}')::double precision);
BEGIN
    INSERT INTO grants (tenant_id, id, run_id, step_index, attempt, digest, policy_digest, span_id, fencing_token,
            secret_hash, expires_at)
        VALUES ((c ->> 'tenant_id')::uuid, (c #>> '{grant,id}')::uuid, (c ->> 'run_id')::uuid,
            (c ->> 'step_index')::integer, (c ->> 'attempt')::integer, c ->> 'digest', c ->> 'policy_digest',
            c #>> '{grant,span_id}', (c ->> 'fencing_token')::bigint, decode(c #>> '{grant,secret_hash}', 'hex'),
            v_expires);
    INSERT INTO reservations (tenant_id, grant_id, position, scope_kind, scope_id, unit, period, starts_at, amount)
        SELECT (c ->> 'tenant_id')::uuid, (c #>> '{grant,id}')::uuid, r.ord, r.scope_kind, r.scope_id, r.unit,
               COALESCE(r.period, 'total'), r.starts_at, r.amount
        FROM ROWS FROM (jsonb_to_recordset(p_reserved)
            AS (scope_kind text, scope_id uuid, unit text, period text, starts_at timestamptz, amount numeric))
            WITH ORDINALITY AS r (scope_kind, scope_id, unit, period, starts_at, amount, ord);
    RETURN jsonb_build_object('grant_id', c #> '{grant,id}', 'span_id', c #> '{grant,span_id}', 'expires_at', v_expires);
END
$$;
